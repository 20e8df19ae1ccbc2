"""One training run, for every method: data, steps, checkpoints, report."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outpace.bench.report import provenance, read_json, write_json
from outpace.config import EngineConfig, cache_dir, flag
from outpace.engine.engine import DEFAULT_MODEL_NAME, choose_dtype
from outpace.errors import ConfigError
from outpace.models.draft_checkpoint import read_trained
from outpace.models.hub import resolve_draft, resolve_model
from outpace.models.loader import load_config
from outpace.models.tokenizer import load_tokenizer
from outpace.training import method as methods
from outpace.training.data import Corpus, PackedRows, Report, collate, epoch_order, load_corpus, pack
from outpace.training.hidden import HiddenStates, cache_directory
from outpace.training.method import Recipe, Run, Trainable, TrainableDraft, TrainBatch
from outpace.training.trunk import Trunk, fingerprint, load_trunk

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKPOINT, _LOG, _REPORT = "checkpoint", "log.jsonl", "training.json"
_MAX_NORM = 1.0  # of gradients
_NOT_THE_CURVE = ("out", "save_every", "resume", "hidden_cache")  # settings that change no loss
_LENGTH = "max_steps"  # changes those to come only, and so may differ on --resume
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PACKAGES = ("accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        method: A name of `training/methods`.
        data: File or hub id with conversations.
        out: Directory that is written.
        model: The target; None is the default model.
        init: A draft that an earlier run wrote, to begin with; None begins anew.
        settings: The method's own.
        epochs: Passes over the data.
        max_steps: Most steps, if they are to be fewer.
        lr: Peak learning rate; None is the method's.
        batch_tokens: Tokens of a step on each device.
        max_len: Tokens of a row; longer conversations are cut.
        holdout: Conversations that are not trained on, to measure on.
        max_bad_share: Most lines of `data` that may be of no use, as a share.
        seed: Of order and initial weights.
        dtype: Of the frozen target; None is bfloat16 where the device computes in it.
        save_dtype: Of the weights that are written; None is `dtype`.
        hidden_cache: Where hidden states are kept: a directory, `none`, or None for the cache directory.
        save_every: Steps between checkpoints.
        resume: Whether to go on from the last checkpoint in `out`.
    """

    method: str
    data: str
    out: Path
    model: str | None = None
    init: Path | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int = 1
    max_steps: int | None = None
    lr: float | None = None
    batch_tokens: int = 4096
    max_len: int = 1024
    holdout: int = 100
    max_bad_share: float = 0.01
    seed: int = 0
    dtype: str | None = None
    save_dtype: str | None = None
    hidden_cache: str | None = None
    save_every: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.batch_tokens < self.max_len:
            raise ConfigError(
                f"{flag('batch_tokens')} must be at least {flag('max_len')} {self.max_len}, a row, "
                f"got {self.batch_tokens}"
            )

    def curve(self) -> dict[str, Any]:
        """What the losses depend on, as JSON has it."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_THE_CURVE}
        init = None if self.init is None else str(resolve_draft(str(self.init), self.method))
        return values | {
            "init": None if init is None else fingerprint(init),
            "method_settings": dataclasses.asdict(methods.make_settings(self.method, self.settings)),
        }


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a draft or a model and writes it to `config.out`.

    Returns:
        The report, which is in `training.json` there too.

    Raises:
        ConfigError: A setting is at fault, or the model or the data cannot be had.
    """
    settings = methods.make_settings(config.method, config.settings)
    _check_out(config)
    accelerator = _accelerator()
    path = resolve_model(config.model)
    shape = load_config(path)
    if config.max_len > shape.max_position_embeddings:
        raise ConfigError(
            f"{flag('max_len')} {config.max_len} is above the model's limit of "
            f"{shape.max_position_embeddings} positions"
        )
    tokenizer = load_tokenizer(path)
    corpus, data_report = load_corpus(
        config.data, tokenizer, shape.eos_token_ids, config.max_len, config.max_bad_share
    )
    # the same for every method and seed
    held = epoch_order(len(corpus), 0, seed=0)[: min(config.holdout, len(corpus) // 2)]
    counts = [corpus.answer_counts(shape.vocab_size, documents) for documents in (None, held)]
    trunk = load_trunk(config.model, _dtype(config, accelerator.device), accelerator.device)
    run = Run(
        config.method,
        config.model or DEFAULT_MODEL_NAME,
        path,
        config.seed,
        config.max_len,
        counts[0] - counts[1],
        (*shape.eos_token_ids, *tokenizer.all_special_ids),
        None if config.save_dtype is None else _DTYPES[config.save_dtype],
        None if config.init is None else read_trained(config.init, config.method, shape),
    )
    torch.manual_seed(config.seed)
    trained = methods.create(trunk, run, settings)
    if run.init is not None:
        if not isinstance(trained, TrainableDraft):
            raise ConfigError(f"{config.method} trains no draft: it begins with {flag('model')}")
        trained.begin_with(run.init.weights)
    training = _Training(config, accelerator, trunk, trained, corpus, held)
    training.run()
    report = training.report(data_report)
    if accelerator.is_main_process:
        trained.save(config.out)
        write_json(config.out / _REPORT, report)
        shutil.rmtree(config.out / _CHECKPOINT, ignore_errors=True)
    return report


def _check_out(config: TrainConfig) -> None:
    """Nothing is overwritten, and a run is taken up only with the settings it began with."""
    saved = config.out / _CHECKPOINT / "run.json"
    if not config.resume:
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise ConfigError(
                f"{config.out} is not empty: choose another {flag('out')}, or {flag('resume')} its run"
            )
        return
    if not saved.exists():
        raise ConfigError(f"{config.out} has no checkpoint to {flag('resume')} from")
    before, now = read_json(saved), config.curve()
    for name, value in json.loads(json.dumps(now)).items():
        if name != _LENGTH and before.get(name) != value:
            raise ConfigError(
                f"{config.out} was begun with {name} {before.get(name)!r}, not {value!r}: it can be resumed "
                "only as it was"
            )


def _accelerator() -> Accelerator:
    """Device, number of processes, and what of their gradients.

    Raises:
        ConfigError: There is no accelerate.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ConfigError("training needs accelerate: pip install 'outpace[train]'") from None
    return Accelerator()


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype is not None:
        return _DTYPES[config.dtype]
    return choose_dtype(EngineConfig()) if device.type == "cpu" else torch.bfloat16


class _Training:
    """The parts of a run, and how far it has come."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trunk: Trunk,
        trained: Trainable,
        corpus: Corpus,
        held: list[int],
    ) -> None:
        self._config, self._accelerator, self._corpus, self._trained = config, accelerator, corpus, trained
        self._num_rows = config.batch_tokens // config.max_len
        self._hidden = HiddenStates(trunk, corpus, trained.hidden_layers, self._hidden_directory(trunk))
        self._held = held
        self._batches = self._plan()
        recipe = trained.recipe
        optimizer = torch.optim.AdamW(
            trained.groups(config.lr or recipe.lr),
            weight_decay=recipe.weight_decay,
            fused=True,  # one pass over the weights, which counts where they are a whole model's
        )
        # stepped by the loop and not by accelerate, whose own would count processes
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_share(step, len(self._batches), recipe)
        )
        self._model, self._optimizer = accelerator.prepare(trained, optimizer)
        accelerator.register_for_checkpointing(self._schedule)
        self._step = 0
        self._seconds = 0.0
        self._planned = [[0, len(self._batches)]]  # from which step on a run of how many
        if config.resume:
            self._load()

    def _hidden_directory(self, trunk: Trunk) -> Path | None:
        kept = self._config.hidden_cache
        if kept == "none" or not self._trained.hidden_layers:
            return None
        root = cache_dir() / "hidden_states" if kept is None else Path(kept)
        return cache_directory(root, fingerprint(self._config.model), self._corpus, trunk.dtype)

    def _plan(self) -> list[PackedRows]:
        """The batches of this process, all epochs one after the other; each step takes one.

        Raises:
            ConfigError: There are none.
        """
        config, accelerator = self._config, self._accelerator
        size = accelerator.num_processes
        lengths, held = self._corpus.lengths().tolist(), set(self._held)
        batches: list[PackedRows] = []
        for epoch in range(config.epochs):
            order = [d for d in epoch_order(len(lengths), epoch, config.seed) if d not in held]
            of_epoch = pack(lengths, order, config.max_len, self._num_rows)
            # every process takes as many: what does not divide is left for another epoch's order
            even = len(of_epoch) // size * size
            batches += of_epoch[accelerator.process_index : even : size]
        if not batches or not held:
            raise ConfigError(
                f"{len(lengths)} conversations are too few: {flag('holdout')} takes {len(held)} (it needs "
                f"one), and each of {size} processes needs a batch of {flag('batch_tokens')}"
            )
        return batches[: config.max_steps]

    def run(self) -> None:
        """All steps that are left."""
        accelerator, config = self._accelerator, self._config
        config.out.mkdir(parents=True, exist_ok=True)
        with _Progress(accelerator.is_main_process, len(self._batches), self._step) as progress:
            log = (config.out / _LOG).open("a", encoding="utf-8") if accelerator.is_main_process else None
            with log or nullcontext():
                for rows in self._batches[self._step :]:
                    record = self._train(rows)
                    progress.show(record)
                    if log is not None:
                        log.write(json.dumps(record) + "\n")
                        log.flush()
                    if self._step % config.save_every == 0 and self._step < len(self._batches):
                        self._save()

    def _train(self, rows: PackedRows) -> dict[str, Any]:
        """One step; what is logged of it."""
        begin = time.perf_counter()
        batch = self._batch(rows)
        loss, metrics = self._model(batch)
        self._accelerator.backward(loss)
        value = loss.item()
        norm = self._accelerator.clip_grad_norm_(self._trained.parameters(), _MAX_NORM)
        if not math.isfinite(value):
            raise ConfigError(f"the loss is {value} at step {self._step}: lower {flag('lr')}")
        lr = self._schedule.get_last_lr()[0]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self._step += 1
        seconds = time.perf_counter() - begin
        self._seconds += seconds
        num_tokens = int((batch.documents >= 0).sum())
        return {
            "step": self._step,
            "loss": value,
            **metrics,
            "lr": lr,
            "grad_norm": float(norm),
            "tokens_per_s": num_tokens / seconds,
        }

    def _batch(self, rows: PackedRows) -> TrainBatch:
        return self._hidden.attach(collate(self._corpus, rows), rows)

    def _save(self) -> None:
        """Writes everything that the next step depends on, as a whole or not at all."""
        directory = self._config.out / _CHECKPOINT
        draft = directory.with_name(_CHECKPOINT + ".new")
        self._accelerator.save_state(str(draft))
        if self._accelerator.is_main_process:
            state = {
                "step": self._step,
                "seconds": self._seconds,
                "planned": self._planned,
                "corpus": self._corpus.checksum(),
            }
            write_json(draft / "run.json", self._config.curve() | state)
            shutil.rmtree(directory, ignore_errors=True)
            draft.replace(directory)
        self._accelerator.wait_for_everyone()

    def _load(self) -> None:
        """Goes back to the checkpoint; of the log only what came before it stays.

        Raises:
            ConfigError: It was made with other data.
        """
        directory = self._config.out / _CHECKPOINT
        state = read_json(directory / "run.json")
        if state["corpus"] != self._corpus.checksum():
            raise ConfigError(f"{self._config.data} is not what {self._config.out} was begun with")
        self._accelerator.load_state(str(directory))
        self._step, self._seconds = state["step"], state["seconds"]
        if state["planned"][-1][1] != len(self._batches):
            self._planned = [*state["planned"], [self._step, len(self._batches)]]
        else:
            self._planned = state["planned"]
        log = self._config.out / _LOG
        if self._accelerator.is_main_process and log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(lines[: self._step]), encoding="utf-8")

    def report(self, data: Report) -> dict[str, Any]:
        """Measures on the conversations that were held out, and says where it all came from."""
        order = pack(self._corpus.lengths().tolist(), self._held, self._config.max_len, self._num_rows)
        metrics = self._trained.measure(self._batch(rows) for rows in order)
        where = provenance(self._config.seed)
        where["versions"] |= {name: metadata.version(name) for name in _PACKAGES if _is_installed(name)}
        return {
            "kind": "train",
            **where,
            "settings": {**json.loads(json.dumps(dataclasses.asdict(self._config), default=str))},
            "method_settings": self._config.curve()["method_settings"],
            "model_sha256": fingerprint(self._config.model),
            "init_sha256": self._config.curve()["init"],
            "data": {
                "sha256": data.sha256,
                "num_lines": data.num_lines,
                "num_conversations": len(self._corpus),
                "num_tokens": int(self._corpus.offsets[-1]),
                "num_cut": data.num_cut,
                "num_without_answer": data.num_without_answer,
                "bad_lines": data.bad,
            },
            "draft_vocab": self._vocab_report(),
            "num_parameters": sum(p.numel() for p in self._trained.parameters()),
            "num_processes": self._accelerator.num_processes,
            "num_steps": self._step,
            "planned_steps": self._planned,
            "seconds": self._seconds,
            "holdout": len(self._held),
            "metrics": metrics,
        }

    def _vocab_report(self) -> dict[str, Any] | None:
        """How many tokens are drafted, and their share of the answers that were held out."""
        vocab = self._trained.vocab
        if vocab is None:
            return None
        counts = self._corpus.answer_counts(vocab.target_size, self._held).to(self._accelerator.device)
        return {"size": len(vocab), "coverage": vocab.coverage(counts)}


def lr_share(step: int, num_steps: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of the peak: a linear rise, then the recipe's fall to 0."""
    warmup = math.ceil(recipe.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    rest = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * rest)) if recipe.schedule == "cosine" else 1 - rest


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


class _Progress:
    """A bar on stderr with loss, accuracies and speed."""

    def __init__(self, is_shown: bool, num_steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        shown = is_shown and console.is_terminal
        self._bar = Progress(*columns, console=console, refresh_per_second=2, disable=not shown)
        self._task = self._bar.add_task("", total=num_steps, completed=done)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Tells of a step."""
        accuracies = [f"{v:.2f}" for k, v in record.items() if k.startswith("accuracy_")]
        speed = f"{record['tokens_per_s']:.0f} tokens/s"
        text = f"loss {record['loss']:.3f}  accuracy {' '.join(accuracies)}  {speed}"
        self._bar.update(self._task, advance=1, description=text)
