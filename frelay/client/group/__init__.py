"""A group: N functions of one job, each with a wire to the others, and the collectives over them."""
