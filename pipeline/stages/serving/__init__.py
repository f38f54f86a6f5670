"""`medseg serve`: jobs on disk, one queue, worker processes; `web/` is how clients reach them."""
