"""From matched to closed: the hand-off of two legs, the pumps between them, and how they end."""
