"""Which part of a model a rank has, when several compute it together (Shoeybi et al., "Megatron-LM", 2019).

Attention is divided by heads and the MLP by its width: q, k, v, gate and up by rows of their weights, so that
a rank computes whole heads and channels alone; out and down by columns, so that what they give is a summand
of the whole. Norms and the embedding are everybody's. The output head is the first rank's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from outpace.config import flag
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.stored import WHOLE, Part


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` equal parts.

    Attributes:
        rank: Which, in [0, size).
        size: How many there are; 1 is the whole model.
    """

    rank: int = 0
    size: int = 1

    def config(self, model: ModelConfig) -> ModelConfig:
        """The shape of this part, which is that of a narrower model: `Decoder` and `KVCache` take it as one.

        Where there are fewer key and value heads than ranks, several ranks have the same one.

        Args:
            model: The whole model's shape.

        Raises:
            ConfigError: The model does not divide into so many parts.
        """
        if not _divides(model, self.size):
            sizes = [size for size in range(1, model.num_heads + 1) if _divides(model, size)]
            raise ConfigError(
                f"{flag('tensor_parallel_size')} {self.size} does not divide the model's {model.num_heads} "
                f"attention heads, {model.num_kv_heads} key and value heads and MLP of "
                f"{model.intermediate_size}: choose one of {', '.join(map(str, sizes))}"
            )
        return replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=max(1, model.num_kv_heads // self.size),
            intermediate_size=model.intermediate_size // self.size,
            tie_word_embeddings=model.tie_word_embeddings and self.rank == 0,  # others have no head
        )

    def parts(self, model: ModelConfig) -> dict[str, Part]:
        """The weights this rank has, by name, and which part of each.

        Args:
            model: The whole model's shape, which divides into so many parts.
        """
        own, every = self.config(model), model.weight_shapes()
        # For fewer key and value heads than ranks this is the head that the rank's query heads belong to.
        first_kv_head = self.rank * model.num_kv_heads // self.size
        q = _range(self.rank * own.num_heads, own.num_heads, model.head_dim)
        kv = _range(first_kv_head, own.num_kv_heads, model.head_dim)
        width = _range(self.rank * own.intermediate_size, own.intermediate_size)
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": width, "up_proj": width}
        columns = {"o_proj": q, "down_proj": width}
        parts: dict[str, Part] = {}
        for name in every:
            module, kind = name.split(".")[-2:]
            if self.rank > 0 and (module == "lm_head" or (module in columns and kind == "bias")):
                continue  # a bias belongs to one summand only
            if module in rows:
                parts[name] = (rows[module],)
            elif module in columns and kind == "weight":
                parts[name] = (slice(None), columns[module])
            else:
                parts[name] = WHOLE
        return parts


WHOLE_MODEL = Shard()


def _divides(model: ModelConfig, size: int) -> bool:
    """Whether a model has `size` equal parts."""
    by_kv_heads = model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0
    return model.num_heads % size == 0 and model.intermediate_size % size == 0 and by_kv_heads


def _range(first: int, number: int, width: int = 1) -> slice:
    return slice(first * width, (first + number) * width)
