import collections

from cm3jax import doctor

GIB = 2**30
Memory = collections.namedtuple("Memory", "available total")
Disk = collections.namedtuple("Disk", "free total")


def test_this_machine_is_fit(capsys, monkeypatch):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(8 * GIB, 16 * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Disk(8 * GIB, 16 * GIB))
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "8 x cpu" in text and "8.0 of 16.0 GiB free" in text and "All that the quickstart needs is here." in text


def test_too_little_memory_and_disk_are_problems(capsys, monkeypatch):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(GIB, 16 * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Disk(GIB, 16 * GIB))
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert (
        "! the quickstart takes up to 4 GiB of memory" in text and "! the quickstart takes up to 2 GiB of disk" in text
    )


def test_a_missing_package_is_a_problem_with_its_fix(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "" if name == "grain" else "1.0")
    lines, faults = doctor.packages()
    assert faults == ["grain is missing: pip install -e ."]
    assert "jax 1.0" in lines and "grain 1.0" not in lines


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "faiss" else name)
    assert "[retrieval] missing faiss: pip install -e '.[retrieval]'" in doctor.extras()
    assert "[tfds] installed" in doctor.extras()


def test_no_device_is_a_problem(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("Unknown backend: 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    assert "jax finds no device (Unknown backend: 'tpu'); JAX_PLATFORMS is cpu" in doctor.devices()[1]


def test_an_unused_gpu_is_told(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert any("pip install -e '.[cuda]'" in line for line in doctor.hints("cpu"))
    assert not any("cuda" in line for line in doctor.hints("gpu"))
