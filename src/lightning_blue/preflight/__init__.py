"""What a careful person checks before an expensive run: the model, the facts, what it will cost."""
