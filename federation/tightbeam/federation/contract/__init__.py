"""What server and clients of a federation both go by: run config, records, layers, terms, budgets."""

__all__: list[str] = []
