"""How far the model of a variant is from the full one, for levers that change its numbers."""

from dataclasses import replace

from jaxinfer.bench.ablate.measure import Quality
from jaxinfer.bench.variants import Variants
from jaxinfer.config import Config
from jaxinfer.quality.validate import validate


class Judge:
    """Compares with the unquantised model on the bundled text; each kind of numbers once."""

    def __init__(self, made: Variants, *, max_tokens: int = 4096, window: int = 512) -> None:
        """With `max_tokens` of 0 nothing is compared."""
        self._made = made
        self._max_tokens = max_tokens
        self._window = window
        self._known: dict[tuple[str, str, str], Quality] = {}

    def __call__(self, config: Config) -> Quality | None:
        """None where weights and pages are those of the full model."""
        engine = config.engine
        key = (config.quant.scheme, engine.cache.dtype, engine.compute_dtype)
        if key[:2] == ("none", "auto") or not self._max_tokens:
            return None
        if key not in self._known:
            full = replace(config, quant=replace(config.quant, scheme="none"))
            report = validate(
                self._made.checkpoint(full),
                self._made.checkpoint(config),
                engine=engine,
                max_tokens=self._max_tokens,
                window=self._window,
            )
            text = report.texts[0]
            self._known[key] = Quality(text.kl.value, text.top1.value, text.perplexity_ratio.value)
        return self._known[key]
