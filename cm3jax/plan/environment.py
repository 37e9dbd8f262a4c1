"""What the environment must hold before jax is imported, for a plan to compile without a TPU. Set by the caller."""

NEEDED = {
    "JAX_PLATFORMS": "cpu",  # on a machine with a TPU, the chip stays free
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google's metadata server which TPU this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so several plans may run at a time
    # XLA's warnings, which `compiler.captured` keeps from the terminal: without these libtpu drops them unseen.
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
}
