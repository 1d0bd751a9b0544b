"""Placeholder until the compiled module is bound."""

REASON: str | None = "the compiled module sharpkern._C is not built"
