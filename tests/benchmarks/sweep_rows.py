"""A row of the sweep, as its tables read it."""

WHERE = {"versions": {"jax": "1"}, "device": "cpu", "cores": 1}


def row(optimizer, loss, schedule="constant", seed=0, **fields):
    return {
        "workload": "autoencoder",
        "optimizer": optimizer,
        "batch_size": 32,
        "phase": "test",
        "learning_rate": 1.0,
        "schedule": schedule,
        "seed": seed,
        "steps": 10,
        "diverged": loss is None,
        "loss": loss,
        "accuracy": None,
        "evaluations": [] if loss is None else [[10, loss]],
        **WHERE,
        **fields,
    }
