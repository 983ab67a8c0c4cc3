"""ModelShape: the integers of a decoder's config, and sizes that follow from them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lrc_edge.errors import UserError

MOST = 2**31 - 1  # the largest count: runtimes store it in 32 bits
MOST_LAYERS = 10_000  # every weight of each is listed


@dataclass(frozen=True)
class ModelShape:
    """Shape of a dense decoder; fields carry Hugging Face's config names."""

    family: str  # model_type
    vocab_size: int
    hidden_size: int  # the residual width
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tied: bool  # lm_head is the token embedding

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> ModelShape:
        """Read a config.json. Raises UserError naming `where` and the field that is missing or not a count."""
        def count(field: str, default: int | None = None, most: int = MOST) -> int:
            value = config.get(field)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise UserError(f"{where}: {field} = {value!r:.80}: need a positive integer; fix the config")
            if value > most:
                raise UserError(f"{where}: {field} = {value!s:.80}: need at most {most:,}; fix the config")
            return value

        hidden, heads = count("hidden_size"), count("num_attention_heads")
        shape = cls(
            family=str(config.get("model_type")), vocab_size=count("vocab_size"), hidden_size=hidden,
            intermediate_size=count("intermediate_size"),
            num_hidden_layers=count("num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads, num_key_value_heads=count("num_key_value_heads", heads),
            head_dim=count("head_dim", hidden // heads or None),
            max_position_embeddings=count("max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", False)))
        if shape.num_attention_heads % shape.num_key_value_heads:
            raise UserError(f"{where}: {heads} attention heads are not divisible by {shape.num_key_value_heads} "
                            "key/value heads; fix the config")
        return shape

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def o_size(self) -> int:
        """Width of the outputs of all query heads, which o_proj reads."""
        return self.q_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    # Keys and values are axes of their own: a student's may follow from the teacher's by different maps.
    @property
    def k_size(self) -> int:
        return self.kv_size

    @property
    def v_size(self) -> int:
        return self.kv_size

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        from lrc_edge.families import weights_of

        return sum(weight.numel for weight in weights_of(self))

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of the key/value cache per token."""
        return 2 * self.num_hidden_layers * self.kv_size

    def resized(self, sizes: Mapping[str, int]) -> ModelShape:
        """Return the shape with other sizes, by field."""
        return replace(self, **sizes)  # type: ignore[arg-type]

    def with_hidden_size(self, hidden_size: int) -> ModelShape:
        """Return the shape with another residual width: that of a width-only student."""
        return self.resized({"hidden_size": hidden_size})

    def as_config(self) -> dict[str, Any]:
        """Return the fields of a config.json that hold the shape, except model_type."""
        fields = asdict(self)
        del fields["family"], fields["tied"]
        return fields | {"tie_word_embeddings": self.tied}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ModelShape:
        """Read the result of `as_dict`. Raises TypeError for another key or type, ValueError for a value that is not a
        count."""
        shape = cls(**table)
        if not isinstance(shape.family, str) or not isinstance(shape.tied, bool):
            raise TypeError(f"family = {shape.family!r:.40}, tied = {shape.tied!r:.40}")
        for name, count in asdict(shape).items():
            if name not in ("family", "tied") and (type(count) is not int or not 0 < count <= MOST):
                raise ValueError(f"{name} = {count!r:.40}: need a count")
        return shape
