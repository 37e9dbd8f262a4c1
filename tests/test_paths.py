"""Paths that hang, and folders in a bucket, through tensorstore's real client against a server of this test."""

import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from cm3jax.data import paths
from cm3jax.types import UserError


class Bucket(http.server.BaseHTTPRequestHandler):
    """The part of Google's JSON API that reading needs: list objects, and their bytes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query, _, name = urllib.parse.parse_qs(url.query), *url.path.rpartition("/o")[1:]
        if not name:
            start, end = query.get("startOffset", [""])[0], query.get("endOffset", ["\U0010ffff"])[0]
            files = {n: d for n, d in sorted(self.files.items()) if start <= n < end}
            found = [{"name": n, "size": str(len(d))} for n, d in files.items()]
            return self.answer(200, json.dumps({"kind": "storage#objects", "items": found}).encode())
        name = urllib.parse.unquote(name[1:])
        self.asked.append(name)
        data = self.files.get(name)
        self.answer(404 if data is None else 200, data or b"")

    def answer(self, code: int, data: bytes):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """A server of gs://bucket; its `files` and the names `asked` for."""
    handler = type("Handler", (Bucket,), {"files": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "abc")
    yield handler
    server.shutdown()


FILES = {
    "runs/a/tokens/stage.json": b"{}",
    "runs/a/tokens/train-00000-of-00001.ids.npy": bytes(range(256)) * 999,
    "runs/a/tokens/.hidden": b"x",
    "runs/a/tokens/checkpoints/1/state": b"x",
    "runs/a/tokens/deep/file": b"",
    "runs/b/tokens/stage.json": b"other",
}


def there(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_a_bucket_is_copied_whole(bucket, tmp_path):
    bucket.files.update(FILES)
    out = paths.copy("gs://bucket/runs/a/tokens", tmp_path / "tokens")
    assert there(out) == {
        name: FILES[f"runs/a/tokens/{name}"] for name in ("stage.json", "train-00000-of-00001.ids.npy", "deep/file")
    }


def test_a_copy_is_made_once_and_again_when_the_bucket_has_another(bucket, tmp_path):
    bucket.files.update(FILES)
    paths.copy("gs://bucket/runs/a/tokens/", tmp_path / "t")
    bucket.asked.clear()
    paths.copy("gs://bucket/runs/a/tokens/", tmp_path / "t")
    assert bucket.asked == ["runs/a/tokens/stage.json"]
    bucket.files.update({"runs/a/tokens/stage.json": b"{new}", "runs/a/tokens/deep/file": b"new"})
    paths.copy("gs://bucket/runs/a/tokens/", tmp_path / "t")
    assert there(tmp_path / "t")["deep/file"] == b"new"


def test_a_copy_that_was_cut_off_goes_on(bucket, tmp_path, monkeypatch):
    bucket.files.update(FILES)
    save = paths.save

    def cut(path, data):
        if path.name == "file":
            raise KeyboardInterrupt
        save(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paths, "save", cut)
        paths.copy("gs://bucket/runs/a/tokens", tmp_path / "t")
    assert not (tmp_path / "t" / "stage.json").exists()
    bucket.asked.clear()
    paths.copy("gs://bucket/runs/a/tokens", tmp_path / "t")
    assert "runs/a/tokens/train-00000-of-00001.ids.npy" not in bucket.asked and len(there(tmp_path / "t")) == 3


def test_a_folder_that_is_no_finished_stage_is_refused(bucket, tmp_path):
    bucket.files["runs/c/file"] = b""
    with pytest.raises(UserError, match="holds 1 other files but no stage.json"):
        paths.copy("gs://bucket/runs/c", tmp_path)
    with pytest.raises(UserError, match="holds nothing but no stage.json"):
        paths.copy("gs://bucket/runs/d", tmp_path)


def test_a_path_that_hangs_gives_one_line_within_the_limit(monkeypatch):
    monkeypatch.setattr(paths, "REACH", 0.2)
    forever = threading.Event()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'gs://x/y': no answer in 0 s; check the network and the credentials"):
        paths.within(forever.wait, "gs://x/y")
    with pytest.raises(UserError, match="check the disk or mount"):
        paths.within(forever.wait, "/mnt/x")
    assert time.monotonic() - start < 5
    forever.set()


def test_a_server_that_never_answers_gives_one_line(monkeypatch, tmp_path):
    """As the real one does without a network: the connection stands, and nothing comes."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "abc")
        monkeypatch.setattr(paths, "REACH", 0.3)
        with pytest.raises(UserError, match="'gs://bucket/x': no answer in 0 s"):
            paths.copy("gs://bucket/x", tmp_path)


def test_a_hanging_path_keeps_no_process_alive():
    code = (
        "import threading\nfrom cm3jax.data import paths\nfrom cm3jax.types import UserError\npaths.REACH = 0.1\n"
        "try:\n    paths.within(threading.Event().wait, 'gs://x')\nexcept UserError as e:\n    print(e)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "no answer" in found.stdout


def test_what_the_call_raises_or_returns_comes_back(tmp_path):
    assert paths.within(lambda: 3, "x") == 3
    assert paths.reach(tmp_path) and not paths.reach(tmp_path / "none")
    with pytest.raises(ZeroDivisionError):
        paths.within(lambda: 1 // 0, "x")


def test_the_limit_is_that_of_the_promise():
    assert paths.REACH == 20.0


def test_a_bucket_is_refused_where_a_disk_is_needed():
    with pytest.raises(UserError, match="run folder 'gs://x/y': must be on a disk"):
        paths.local_only("gs://x/y", "run folder")


def test_training_takes_its_inputs_from_a_bucket(bucket, tmp_path, monkeypatch):
    """A run is made of toy stages, uploaded, and the decoder trained elsewhere on a copy of what it needs."""
    import dataclasses

    from cm3jax import cli, config, run

    called, SHARD = [], "train-00000-of-00001.array_record"

    def work(recipe, folder, name):
        called.append(name)
        paths.save(run.STAGES[name].folder(folder) / SHARD, name.encode())

    stages = {n: dataclasses.replace(s, call=lambda r, f, n=n: work(r, f, n)) for n, s in run.STAGES.items()}
    monkeypatch.setattr(run, "STAGES", stages)
    recipe = config.load("configs/cm3leon/tiny.py")
    prepared = dataclasses.replace(recipe.prepare, source="scenes:easy")
    for name in ("prepare", "text", "image", "tokens"):
        run.run(dataclasses.replace(recipe, prepare=prepared), tmp_path / "a", only=name)
    bucket.files.update({f"runs/a/{name}": data for name, data in there(tmp_path / "a").items()})
    called.clear()
    arguments = ["train", "configs/cm3leon/tiny.py", "--inputs", "gs://bucket/runs/a"]
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert called == ["decoder"]
    assert (tmp_path / "b" / "tokens" / SHARD).read_bytes() == b"tokens"
    assert (tmp_path / "b" / "prepared" / "stage.json").exists()
    assert not (tmp_path / "b" / "prepared" / SHARD).exists()
    assert cli.main(arguments) == 2


def test_a_mixture_takes_sets_from_a_bucket(bucket, tmp_path):
    bucket.files.update(FILES)
    found = paths.at_hand("gs://bucket/runs/a/tokens", tmp_path / ".sets")
    assert found.parent == tmp_path / ".sets" and len(there(found)) == 3
    assert paths.at_hand(str(tmp_path), tmp_path / ".sets") == tmp_path
