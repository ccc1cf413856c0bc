"""What is read off a compiled program: off texts in XLA's notation, and a real one."""

import compiled
import jax
import jax.numpy as jnp
import pytest
from compiled import Array

# Eight devices, and the three notations for the groups that XLA has.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %x = f32[10]{0} get-tuple-element(%p), index=1
  %r = (f32[10]{0}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y), \
replica_groups=mesh['i'=4,'j'=2] {'i','j'}, to_apply=%sum
}

%condition (p: (s32[], f32[10])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0), metadata={op_name="not = f32[9] all-to-all(x)"}
  %g = f32[40]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %s = f32[10]{0} reduce-scatter(%g), replica_groups={{0,1},{2,3},{4,5},{6,7}}, \
to_apply=%sum
  %none = f32[10]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%sum
  %p = f32[10]{0} collective-permute(%s), source_target_pairs={{0,1},{1,0}}
  ROOT %w = (s32[], f32[10]{0}) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_the_collectives_of_a_program():
    f32, bf16 = Array("f32", (10,)), Array("bf16", (2, 3))
    assert compiled.read(PROGRAM).collectives == (
        ("all-reduce", (f32, bf16), 8, 3),
        ("all-gather", (Array("f32", (40,)),), 4, 1),
        ("reduce-scatter", (f32,), 2, 1),
        ("all-reduce", (f32,), 1, 1),
        ("collective-permute", (f32,), 8, 1),
    )


def test_collectives_by_kind():
    program = compiled.read(PROGRAM)
    assert program.counts() == {
        "all-reduce": 2,
        "all-gather": 1,
        "reduce-scatter": 1,
        "collective-permute": 1,
    }
    # count, elements and bytes of the results, bytes of the whole arrays and in a ring
    ring = 2 * 7 / 8 * (40 + 12)
    kinds = {
        "all-gather": (1, 40, 160, 160, 120),
        "all-reduce": (2, 16 + 10, 92, 92, ring),
        "collective-permute": (1, 10, 40, 40, 40),
        "reduce-scatter": (1, 10, 40, 80, 40),
    }
    assert program.by_kind() == kinds
    assert list(program.by_kind()) == list(kinds)
    assert program.total() == (5, 86, 332, 372, 200 + ring)
    # The loop is run three times.
    kinds["all-reduce"] = (4, 58, 196, 196, 3 * ring)
    assert program.by_kind(executed=True) == kinds
    assert program.total(executed=True).count == 7
    assert compiled.read("ENTRY %e () -> f32[] {\n}").total() == (0, 0, 0, 0, 0)


def test_what_is_begun_and_ended_counts_once():
    """Some of those begun name their operands, and more, beside their results."""
    program = compiled.read(
        """\
HloModule jit_step, replica_count=2, num_partitions=4
ENTRY %main (x: f32[8]) -> f32[8] {
  %a = (f32[8]{0}, /*index=1*/bf16[2,2]{1,0}) all-reduce-start(%x, %y)
  %b = (f32[8]{0}, bf16[2,2]{1,0}) all-reduce-done(%a)
  %c = (f32[2,4]{1,0}, f32[2,32]{1,0:S(1)}) all-gather-start(%x), dimensions={1}
  %d = f32[2,32]{1,0} all-gather-done(%c)
  %e = ((f32[2]{0}, s8[4]{0}), (f32[16]{0}, s8[32]{0})) all-gather-start(%x, %z)
  %f = (f32[16]{0}, s8[32]{0}) all-gather-done(%e)
  %g = (c64[3]{0}, c64[3]{0}, u32[], u32[]) collective-permute-start(%u)
  %h = c64[3]{0} collective-permute-done(%g)
  %i = ((f32[16]{0}), f32[2]{0}, s32[]) reduce-scatter-start(%v)
  ROOT %j = f32[2]{0} reduce-scatter-done(%i)
}
"""
    )
    assert [c.results for c in program.collectives] == [
        (Array("f32", (8,)), Array("bf16", (2, 2))),
        (Array("f32", (2, 32)),),
        (Array("f32", (16,)), Array("s8", (32,))),
        (Array("c64", (3,)),),
        (Array("f32", (2,)),),
    ]
    assert {c.group for c in program.collectives} == {8}
    assert program.kernels == 5


def test_branches_and_loops_in_loops():
    text = """\
%leaf (x: f32[]) -> f32[] {
  ROOT %r = f32[] all-reduce(%x), to_apply=%sum
}
%inner (x: f32[]) -> f32[] {
  ROOT %w = f32[] while(%x), body=%leaf, backend_config={"known_trip_count":{"n":"5"}}
}
%other (x: f32[]) -> f32[] {
  ROOT %g = f32[] all-gather(%x)
}
ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), body=%inner, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %c = f32[] conditional(%p, %x, %x), branch_computations={%other, %none}
}
%none (x: f32[]) -> f32[] {
  ROOT %y = f32[] negate(%x)
}
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
"""
    times = {c.kind: c.times for c in compiled.read(text, devices=2).collectives}
    assert times == {"all-reduce": 35, "all-gather": 1}
    unknown = compiled.read(text.replace('{"n":"7"}', "{}"))
    assert unknown.counts() == {"all-reduce": 1, "all-gather": 1}
    assert unknown.by_kind()["all-reduce"].count == 1
    with pytest.raises(ValueError, match="loop of unknown length: .*all-reduce"):
        unknown.total(executed=True)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *(("pred", 6), ("token", 0), ("s4", 3), ("u8", 6), ("f8e4m3fn", 6)),
        *(("bf16", 12), ("s32", 24), ("f64", 48), ("c64", 48), ("c128", 96)),
    ],
)
def test_bytes_of_an_array(dtype, size):
    assert Array(dtype, (2, 3)).bytes == size


def test_bytes_sent_in_a_ring():
    assert compiled.ring_bytes("all-reduce", 800, 8) == 1400
    assert compiled.ring_bytes("all-gather", 800, 8) == 700
    assert compiled.ring_bytes("reduce-scatter", 800, 8) == 700
    assert compiled.ring_bytes("all-to-all", 800, 8) == 700
    assert compiled.ring_bytes("collective-permute", 800, 8) == 800
    assert compiled.ring_bytes("all-reduce", 800, 1) == 0


def test_a_program_of_one_device():
    def step(x, y):
        return x + y @ y, y.sum()

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    lowered = jax.jit(step, donate_argnums=0).lower(x, x)
    executable = lowered.compile()
    program = compiled.read(executable)
    assert program.collectives == ()
    # A product of matrices, two additions for each element.
    assert program.flops == pytest.approx(2 * 64**3 + 2 * 64**2, rel=1e-3)
    assert program.bytes_accessed >= 3 * 4 * 64**2
    assert program.argument_bytes == 2 * 4 * 64**2
    assert program.aliased_bytes == 4 * 64**2
    assert program.output_bytes >= 4 * 64**2 + 4
    outputs = program.output_bytes - program.aliased_bytes
    assert 4 <= outputs < 100
    assert program.memory_bytes == 8 * 64**2 + outputs + program.temporary_bytes
    assert 1 <= program.kernels <= 4
    assert compiled.read(executable.as_text()) == compiled.Program(
        collectives=(), kernels=program.kernels, product_flops=2.0 * 64**3
    )
    # Seven products of stacks in a loop, and one outside.
    looped = jax.jit(lambda x: jax.lax.map(lambda a: a @ a.mT, x).sum(0) @ x[0, 0])
    x = jax.ShapeDtypeStruct((7, 3, 8, 64), jnp.float32)
    found = compiled.read(looped.lower(x).compile()).product_flops
    assert found == 7 * 3 * 2 * 8 * 8 * 64 + 3 * 2 * 8 * 8 * 64
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled.read(lowered.as_text())
