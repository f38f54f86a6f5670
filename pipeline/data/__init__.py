"""Cases, volumes and their files: what the rest of the pipeline is fed with."""
