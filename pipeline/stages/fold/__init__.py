"""One fold's training: its task, its run, what happens beside the loop."""
