"""GGUF files: the container, and the models in them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from checkpoints import finish, write_checkpoint, write_gguf
from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.gguf_file import GGUFFile
from outpace.models.loader import load_config, load_weights

EXPRESSIBLE = ["llama", "llama-tied", "llama-biases", "llama-wide-heads", "llama-linear", "llama-llama3"]
EXPRESSIBLE += ["qwen2", "qwen2-yarn", "qwen3"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def llama_gguf(llama: Path) -> Path:
    return write_gguf(llama, llama / "model.gguf")


@pytest.mark.parametrize("variant", EXPRESSIBLE)
def test_a_gguf_holds_the_same_model_as_its_hugging_face_directory(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path, variant)
    path = write_gguf(tmp_path, tmp_path / "model.gguf")
    config = load_config(path)
    assert config == load_config(tmp_path)
    ours = load_weights(path, config, torch.float32)
    theirs = load_weights(tmp_path, config, torch.float32)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_mistral_is_called_llama_in_a_gguf(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mistral")
    path = write_gguf(tmp_path, tmp_path / "model.gguf")
    assert load_config(path).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_matrices_are_what_the_gguf_library_makes_of_them(
    tmp_path: Path, llama: Path, kind: str
) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", kind)
    name = "model.layers.2.mlp.up_proj.weight"
    config = load_config(path)
    original = load_weights(llama, config, torch.float32)[name].numpy()
    stored = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quants.quantize(original, stored), stored)
    read = load_weights(path, config, torch.float32)[name]
    assert torch.equal(read, torch.from_numpy(expected))
    assert torch.equal(load_weights(path, config, torch.bfloat16)[name], read.to(torch.bfloat16))


def test_a_tensor_larger_than_a_chunk_is_read_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4100, 96), dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("big", gguf.quants.quantize(values, q8), raw_dtype=q8)
    finish(writer)
    read = GGUFFile(tmp_path / "a.gguf").read("big", torch.float32)
    assert torch.equal(read, torch.from_numpy(gguf.dequantize(gguf.quants.quantize(values, q8), q8)))


def test_metadata_is_what_the_gguf_library_reads(llama_gguf: Path) -> None:
    reader = gguf.GGUFReader(llama_gguf)
    ours = GGUFFile(llama_gguf)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {t.name: tuple(t.shape[::-1].tolist()) for t in reader.tensors} == {
        name: info.shape for name, info in ours.tensors.items()
    }


def test_scaling_of_llama_3_with_other_parameters_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-llama3-short")
    path = write_gguf(tmp_path, tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight .*Hugging Face directory"):
        load_config(path)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"attention__sliding_window": 64}, "attention.sliding_window = 64"),
        ({"expert_count": 8}, "expert_count = 8"),
        ({"logit_scale": 2.0}, "logit_scale = 2.0"),
        ({"rope__scaling__type": "longrope"}, "'longrope'"),
        ({"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor"),
    ],
)
def test_settings_that_change_the_output_are_never_ignored(
    tmp_path: Path, llama: Path, metadata: dict[str, Any], named: str
) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", **metadata)
    with pytest.raises(UnsupportedModelError, match=f"{named}.*is not supported; supported are"):
        load_config(path)


def test_settings_with_their_neutral_value_are_accepted(tmp_path: Path, llama: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", expert_count=0, rope__scaling__attn_factor=1.0)
    assert load_config(path) == load_config(llama)


def write_metadata(
    path: Path, architecture: str, add: Callable[[gguf.GGUFWriter], object] = lambda writer: None
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    finish(writer)
    return path


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "a.gguf", "gemma3")
    with pytest.raises(UnsupportedModelError, match="GGUF architecture 'gemma3'"):
        load_config(path)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "a.gguf", "llama")
    with pytest.raises(ConfigError, match="embedding_length"):
        load_config(path)


def test_a_setting_per_layer_is_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(64)
        writer.add_head_count([4, 2])

    path = write_metadata(tmp_path / "a.gguf", "llama", add)
    with pytest.raises(UnsupportedModelError, match="differs between layers"):
        load_config(path)


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "a.gguf", "llama", lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(UnsupportedModelError, match="one part of a split GGUF"):
        load_config(path)


@pytest.mark.parametrize("length", [0, 3, 20, 200, 5000, -1])
def test_a_file_cut_anywhere_is_one_clear_error(tmp_path: Path, llama_gguf: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama_gguf.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        load_config(path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        load_config(tmp_path / "a.gguf")


def test_other_versions_of_the_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ConfigError, match="GGUF version 1"):
        load_config(tmp_path / "a.gguf")


def test_types_that_cannot_be_dequantised_are_refused_by_name(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGMLQuantizationType.I8
        writer.add_tensor("a", np.zeros((2, 32), np.int8), raw_dtype=kind)

    path = write_metadata(tmp_path / "a.gguf", "llama", add)
    with pytest.raises(UnsupportedModelError, match="a: Dequantization for I8"):
        GGUFFile(path).read("a", torch.float32)
