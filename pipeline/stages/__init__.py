"""One module per command: `run(...)` composes the floors below; only stages know run folders."""
