"""Runs the solvers over unconstrained CUTEst problems and counts points.

One JSON line is written for each problem and solver; cells already there are skipped.
See the README beside this file for the commands.
"""

import argparse
import json
import os
import pathlib
import selectors
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
MAX_POINTS = 5_000
GRADIENT_TOLERANCE = 1e-6
SMALLEST, LARGEST = 2, 1000  # variables


def read(path):
    path = pathlib.Path(path)
    if not path.exists():
        return []
    with path.open() as lines:
        return [json.loads(line) for line in lines if line.strip()]


def configure():
    """Settings of the processor, to be made before JAX is imported."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    # The objective that counts is called back while another program runs, which needs
    # a second thread where the process is bound to one core.
    os.environ.setdefault("NPROC", "2")


def work(flags):
    """In the worker: prints a JSON line before and after each cell."""
    if flags.timing:
        os.environ.setdefault("NPROC", "1")
    configure()
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    import problems
    import solvers

    solvers.MAX_ITER = flags.max_points
    for name in flags.work.split(","):
        oracle = None
        for solver in flags.solvers.split(","):
            print(json.dumps({"start": [name, solver]}), flush=True)
            if oracle is None:
                problem = problems.by_name(name)
                oracle = problems.Oracle(problem, flags.max_points, flags.limit)
            cell = {"problem": name, "n": oracle.n, "solver": solver}
            if flags.timing:
                cell |= solvers.time_one(solver, oracle, GRADIENT_TOLERANCE)
            else:
                cell |= solvers.count_one(solver, oracle, GRADIENT_TOLERANCE)
            print(json.dumps(cell), flush=True)


def drive(names, solver_names, flags):
    """Feeds the worker, one problem after the other, and kills it when it hangs."""
    out = pathlib.Path(flags.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(cell["problem"], cell["solver"]) for cell in read(out)}
    todo = [(p, s) for p in names for s in solver_names if (p, s) not in done]
    while todo:
        # A worker takes all the solvers that the first problem lacks, and all the
        # problems that lack the same ones.
        missing = [s for p, s in todo if p == todo[0][0]]
        batch = [
            p
            for p in dict.fromkeys(p for p, _ in todo)
            if [s for q, s in todo if q == p] == missing
        ]
        command = [sys.executable, __file__, "--work", ",".join(batch)]
        command += ["--solvers", ",".join(missing)] + ["--timing"] * flags.timing
        command += ["--limit", str(flags.limit)]
        command += ["--max-points", str(flags.max_points)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        selector = selectors.DefaultSelector()
        selector.register(worker.stdout, selectors.EVENT_READ)
        current, error = None, "the worker died"
        with out.open("a") as sink:
            while True:
                # The counting stops by itself, and its compilation is not counted.
                patience = flags.limit if flags.timing else 10 * flags.limit
                if not selector.select(patience):
                    error = f"over {patience:g} s"
                    break
                line = worker.stdout.readline()
                if not line:
                    break
                cell = json.loads(line)
                if "start" in cell:
                    current = tuple(cell["start"])
                    continue
                sink.write(line)
                sink.flush()
                todo.remove((cell["problem"], cell["solver"]))
                current = None
                print(
                    f"{cell['problem']:12s} {cell['n']:5d} {cell['solver']:20s}",
                    {k: cell[k] for k in ("points", "seconds", "error") if k in cell},
                    flush=True,
                )
            worker.kill()
            worker.wait()
            if current is not None:
                cell = {"problem": current[0], "solver": current[1], "error": error}
                sink.write(json.dumps(cell) + "\n")
                todo.remove(current)
                print(cell, flush=True)
            elif (
                todo and error == "the worker died" and worker.returncode not in (0, -9)
            ):
                raise RuntimeError("The worker failed before its first cell.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solvers", default="")
    parser.add_argument("--problems", default="")
    parser.add_argument("--every", type=int, default=1, help="each so many problems")
    parser.add_argument("--smallest", type=int, default=SMALLEST)
    parser.add_argument("--out", default="", help="points.jsonl or timing.jsonl")
    parser.add_argument("--timing", action="store_true", help="seconds, not points")
    parser.add_argument("--limit", type=float, default=60, help="seconds a cell")
    parser.add_argument("--max-points", type=int, default=MAX_POINTS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(flags)
        return
    name = "timing.jsonl" if flags.timing else "points.jsonl"
    flags.out = flags.out or str(HERE / "results" / name)
    import problems

    names = (
        flags.problems.split(",")
        if flags.problems
        else [name for name, n in problems.names(LARGEST) if n >= flags.smallest]
    )
    default = "ours,ours-cg,scipy-cg,jaxopt-zoom,jaxopt-hz,optimistix,optax-lbfgs,"
    default += "scipy-lbfgs"
    solver_names = (flags.solvers or default).split(",")
    drive(names[:: flags.every], solver_names, flags)


if __name__ == "__main__":
    main()
