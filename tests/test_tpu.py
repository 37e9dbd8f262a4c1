"""The training step, compiled by the TPU compiler for a slice that is not there."""

import json
import os
import subprocess
import sys

import pytest

from cm3jax.plan import environment

COMPILE = """
import json, math, sys
import jax
from jax.experimental import topologies
sys.path.append("tests")
import shapes
from cm3jax import config as c, sharding, trees
from cm3jax.train import lm, loop
from cm3jax.vocab import Vocab

slice = topologies.get_topology_desc("v5e:4x2", "tpu")
for remat in ("dots", "offload"):
    model = c.Decoder(layers=3, width=384, heads=4, kv_heads=2, remat=remat)
    training = c.Training(steps=2, batch=8, accumulate=2, mesh=c.Mesh(1, 4, 2),
                          optimizer=c.Optimizer(moment_dtype="bfloat16"))
    stage = lm.resolve(c.DecoderStage(model=model, packing=c.Packing(length=1280), training=training), slice.devices[0])
    mesh = sharding.mesh(training.mesh, slice.devices)
    compiled = loop.compile(lm.task(stage, Vocab(text=3000)), training, mesh)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows(mesh))
             for k, x in shapes.batch(stage).items()}
    with jax.set_mesh(mesh):
        program = compiled.step.lower(compiled.abstract, batch).compile()
    memory, text = program.memory_analysis(), program.as_text()
    print(json.dumps({
        "attention": stage.model.attention,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "squares": text.count("1280,1280"),
        "logits": sum(text.count(f"1280,{v}]") for v in (Vocab(text=3000).size // 2, Vocab(text=3000).size)),
        "state": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                     for x in jax.tree.leaves(compiled.abstract)),
        "donated": memory.alias_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
    }))
"""


@pytest.fixture(scope="module")
def compiled():
    """What the compiler made with remat dots and offload, and its log."""
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", **environment.NEEDED}  # with libtpu's warnings
    done = subprocess.run([sys.executable, "-c", COMPILE], env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


@pytest.mark.slow
def test_splash_attention_compiles_in_the_real_step(compiled):
    """Grouped heads of 96, layers in a scan, remat, accumulation, a mesh of fsdp and tensor."""
    (dots, offload), log = compiled
    assert dots["attention"] == offload["attention"] == "splash"
    assert dots["kernels"] == 3  # forward, the gradients of q, those of k and v: nothing is computed twice
    assert offload["kernels"] > 3
    assert not any(x["squares"] or x["logits"] for x in (dots, offload))
    assert "Involuntary full rematerialization" not in log


@pytest.mark.slow
def test_the_state_is_updated_in_place(compiled):
    for found in compiled[0]:
        assert found["state"] <= found["donated"] < 1.2 * found["state"]


@pytest.mark.slow
def test_offload_keeps_the_input_of_each_layer_in_host_memory(compiled):
    dots, offload = compiled[0]
    assert dots["host"] == 0
    assert offload["host"] >= 3 * 1 * 1280 * 384 * 2  # layers, rows of a chip in a part, tokens, width, bfloat16
