"""One relay's life: start, reload, drain; alone or with several worker processes."""
