"""Eight virtual CPU devices, checked shapes and types, and the slow tier's switch; before anything imports jax."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu compiles here and takes no chip: no need for its lock
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
DEVICES = "--xla_force_host_platform_device_count=8"
# Tests compile far more than they compute; without LLVM's optimizations they take about 60 % of the time.
PLAIN = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {PLAIN}".strip()

import hypothesis
import jaxtyping
import pytest

jaxtyping.install_import_hook("cm3jax", "beartype.beartype")

import jax

hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tier too")
    parser.addoption("--network", action="store_true", help="run the tests that need the internet too")
    parser.addoption("--java", action="store_true", help="run the tests that need a Java runtime too")


def pytest_collection_modifyitems(config, items):
    """Deselect, rather than skip, what the options do not ask for: nothing ever reads as skipped."""
    off = [name for name in ("slow", "network", "java") if not config.getoption(f"--{name}")]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in off)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header(config):
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "XLA_FLAGS must give eight virtual CPU devices"
