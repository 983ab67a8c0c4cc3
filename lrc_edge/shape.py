"""ModelShape: the integers of a decoder's config, and what follows from them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from lrc_edge.recipe import Recipe

MOST = 2**31 - 1  # of any count: what runtimes hold in 32 bits
MOST_LAYERS = 10_000  # each is listed, weight by weight


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
        """Read a config.json. Raises UserError naming `where` and the field that is missing or no count."""
        def count(field: str, default: int | None = None, most: int = MOST) -> int:
            value = config.get(field)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise UserError(f"{where}: {field} = {value!r:.80}: need a positive integer; mend the config")
            if value > most:
                raise UserError(f"{where}: {field} = {value!s:.80}: need at most {most:,}; mend the config")
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
                            "key/value heads; mend the config")
        return shape

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """Parameters, a tied head counted once."""
        from lrc_edge.roles import weights_of

        return sum(weight.numel for weight in weights_of(self))

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of the key/value cache that one token takes."""
        return 2 * self.num_hidden_layers * self.kv_size

    def with_hidden_size(self, hidden_size: int) -> ModelShape:
        """The same model with another residual width: what a width-only clone of it is."""
        return replace(self, hidden_size=hidden_size)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ModelShape:
        """What `as_dict` gave. Raises TypeError for another key or type, ValueError for no count."""
        shape = cls(**table)
        if not isinstance(shape.family, str) or not isinstance(shape.tied, bool):
            raise TypeError(f"family = {shape.family!r:.40}, tied = {shape.tied!r:.40}")
        for name, count in asdict(shape).items():
            if name not in ("family", "tied") and (type(count) is not int or not 0 < count <= MOST):
                raise ValueError(f"{name} = {count!r:.40}: need a count")
        return shape


def student_width(recipe: Recipe, teacher: ModelShape) -> int:
    """The recipe's hidden_size, or half the teacher's in the roundest number that quantizes well."""
    if recipe.student.hidden_size:
        return recipe.student.hidden_size
    half = teacher.hidden_size // 2
    return next((half // unit * unit for unit in (256, 64, 32) if half >= unit), max(1, half))
