"""What runs inside a function: joining a route, and the wire to the other function. Standard library only."""
