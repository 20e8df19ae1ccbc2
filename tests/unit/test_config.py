from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from outpace import settings
from outpace.config import EngineConfig, ServerConfig
from outpace.errors import ConfigError


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, [EngineConfig, ServerConfig])
    return vars(parser.parse_args(arguments))


def load(config: type[Any], *arguments: str, **environ: str) -> Any:
    return settings.load(config, parse(*arguments), environ)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("model: from-file\nmax-num-seqs: 7\nmax_num_batched_tokens: 2k\nport: 9001\n")
    return path


def test_without_anything_given_every_setting_has_its_default() -> None:
    assert load(EngineConfig) == EngineConfig()
    assert load(ServerConfig) == ServerConfig()


def test_a_flag_goes_before_the_environment_that_before_yaml_that_before_the_default(yaml_file: Path) -> None:
    arguments = ("--config", str(yaml_file))
    assert load(EngineConfig).max_num_seqs == EngineConfig.max_num_seqs
    assert load(EngineConfig, *arguments).max_num_seqs == 7
    assert load(EngineConfig, *arguments, OUTPACE_MAX_NUM_SEQS="8").max_num_seqs == 8
    assert load(EngineConfig, *arguments, "--max-num-seqs", "9", OUTPACE_MAX_NUM_SEQS="8").max_num_seqs == 9


def test_yaml_keys_may_have_dashes_or_underscores_and_serve_both_configs(yaml_file: Path) -> None:
    assert load(EngineConfig, "--config", str(yaml_file)).max_num_batched_tokens == 2000
    assert load(ServerConfig, "--config", str(yaml_file)).port == 9001


def test_the_config_file_may_be_named_in_the_environment(yaml_file: Path) -> None:
    assert load(EngineConfig, OUTPACE_CONFIG=str(yaml_file)).model == "from-file"


def test_the_model_may_be_positional_or_a_flag_but_not_both_differently() -> None:
    assert load(EngineConfig, "some/model").model == "some/model"
    assert load(EngineConfig, "--model", "some/model").model == "some/model"
    assert load(EngineConfig, "same", "--model", "same").model == "same"
    with pytest.raises(ConfigError, match="given twice: 'one' and --model 'two'"):
        load(EngineConfig, "one", "--model", "two")


def test_booleans_have_a_no_form() -> None:
    assert load(EngineConfig, "--no-enable-prefix-caching").enable_prefix_caching is False
    on = load(EngineConfig, "--enable-prefix-caching", OUTPACE_ENABLE_PREFIX_CACHING="off")
    assert on.enable_prefix_caching is True
    assert load(EngineConfig, OUTPACE_ENABLE_PREFIX_CACHING="False").enable_prefix_caching is False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("64k", 64_000),
        ("1.5k", 1500),
        ("2K", 2048),
        ("2G", 2 * 2**30),
        ("3Mi", 3 * 2**20),
        (" 7 ", 7),
    ],
)
def test_integers_may_carry_a_suffix(text: str, value: int) -> None:
    assert load(EngineConfig, "--kv-cache-memory-bytes", text).kv_cache_memory_bytes == value


@pytest.mark.parametrize("text", ["", "many", "1.5G", "1.5", "0x10", "2GB", "1e9", "9" * 100, "１2"])
def test_what_is_no_integer_is_refused_with_its_source_and_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes must be an integer.*2G") as error:
        load(EngineConfig, "--kv-cache-memory-bytes", text)
    assert repr(text) in str(error.value)


def test_a_malformed_variable_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="OUTPACE_MAX_NUM_SEQS in the environment must be an integer"):
        load(EngineConfig, OUTPACE_MAX_NUM_SEQS="lots")
    with pytest.raises(ConfigError, match="true or false, got 'maybe'"):
        load(EngineConfig, OUTPACE_ENABLE_PREFIX_CACHING="maybe")
    with pytest.raises(ConfigError, match=r"OUTPACE_DTYPE .* one of auto, bfloat16, float32, got 'int3'"):
        load(EngineConfig, OUTPACE_DTYPE="int3")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(ServerConfig, OUTPACE_API_KEY="", OUTPACE_PORT="").api_key is None


def test_a_variable_that_names_no_setting_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match="OUTPACE_MAX_NUM_SEQ names no setting; did you mean OUTPACE_MAX_NUM_SEQS"
    ):
        load(EngineConfig, OUTPACE_MAX_NUM_SEQ="8")


def test_the_cache_directory_and_what_kubernetes_sets_are_let_pass() -> None:
    load(
        EngineConfig,
        OUTPACE_CACHE="/cache",
        OUTPACE_SERVICE_HOST="10.0.0.1",
        OUTPACE_SERVICE_PORT_HTTP="80",
        OUTPACE_PORT_8000_TCP_ADDR="10.0.0.1",
        OTHER="x",
    )
    assert load(ServerConfig, OUTPACE_PORT="tcp://10.0.0.1:8000") == ServerConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-num-sequences: 3", "unknown setting 'max-num-sequences' .* did you mean max_num_seqs"),
        ("max-num-seqs: many", "max_num_seqs in .* must be an integer.* got 'many'"),
        ("max-num-seqs: 1.5", "must be an integer.* got 1.5"),
        ("max-num-seqs: true", "must be an integer.* got True"),
        ("max-num-seqs:", "must be an integer.* got None"),
        ("enable-prefix-caching: 1", "must be true or false, got 1"),
        ("dtype: int3", "must be one of auto, bfloat16, float32"),
        ("dtype: [auto]", "must be one of auto, bfloat16, float32"),
        ("model: 5", "must be a string, got 5"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is twice"),
        ("- model", "must be a mapping of settings, not a list"),
        ("model: [", "is not YAML"),
        ("5: 6", "unknown setting 5"),
    ],
)
def test_a_wrong_yaml_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load(EngineConfig, "--config", str(path))
    assert "\n" not in str(error.value)


def test_yaml_may_be_empty_null_what_is_optional_and_write_sizes_as_flags_do(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("")
    assert load(EngineConfig, "--config", str(path)) == EngineConfig()
    path.write_text("max-model-len: null\nkv-cache-memory-bytes: 2G\n")
    assert load(EngineConfig, "--config", str(path)).kv_cache_memory_bytes == 2**31


def test_a_missing_yaml_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot read --config nowhere\.yaml"):
        load(EngineConfig, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    "arguments",
    [("--port", "70000"), ("--shutdown-timeout", "-1"), ("--api-key", "")],
)
def test_out_of_range_server_settings_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=arguments[0]):
        load(ServerConfig, *arguments)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("max_model_len", 2),
        ("max_num_seqs", 1),
        ("max_num_queued_reqs", 0),
        ("kv_cache_memory_bytes", 1),
        ("num_threads", 1),
    ],
)
def test_out_of_range_engine_settings_are_refused(name: str, least: int) -> None:
    right: Any = {name: least}
    wrong: Any = {name: least - 1}
    EngineConfig(**right)
    with pytest.raises(ConfigError, match=f"must be at least {least}, got {least - 1}"):
        EngineConfig(**wrong)


def test_every_setting_has_help_and_a_flag() -> None:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, [EngineConfig, ServerConfig])
    text = parser.format_help()
    assert "--max-num-seqs N" in text
    assert "--no-enable-prefix-caching" in text
    assert "(default: 8000)" in text


def test_lists_of_integers_come_from_flags_the_environment_and_yaml(tmp_path: Path) -> None:
    def sizes(*arguments: str, **environ: str) -> list[int] | None:
        found: list[int] | None = load(EngineConfig, *arguments, **environ).cudagraph_capture_sizes
        return found

    assert sizes() is None
    assert sizes("--cudagraph-capture-sizes", "1", "2", "8") == [1, 2, 8]
    assert sizes("--cudagraph-capture-sizes", "1,2,8") == [1, 2, 8]
    assert sizes(OUTPACE_CUDAGRAPH_CAPTURE_SIZES="4 8") == [4, 8]
    path = tmp_path / "settings.yaml"
    path.write_text("cudagraph-capture-sizes: [2, 4]\n")
    assert sizes("--config", str(path)) == [2, 4]
    path.write_text("cudagraph-capture-sizes: [2, four]\n")
    for arguments in (("--config", str(path)), ("--cudagraph-capture-sizes", "2", "four")):
        with pytest.raises(ConfigError, match="must be integers with spaces or commas between them"):
            sizes(*arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "gpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"gpu_memory_utilization": 1.1}, r"must be in \(0, 1\], got 1.1"),
        ({"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1}, "give one of them"),
        ({"cudagraph_capture_sizes": [8, 4]}, r"ascending, got \[8, 4\]"),
        ({"cudagraph_capture_sizes": []}, "from 1 on"),
        ({"cudagraph_capture_sizes": [0, 4]}, "from 1 on"),
        ({"cudagraph_capture_sizes": [4], "enforce_eager": True}, "--enforce-eager records no CUDA graphs"),
    ],
)
def test_settings_of_a_gpu_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**wrong)
