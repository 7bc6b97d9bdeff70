"""From accept to matched: listeners, legs, routes, and the lobby in which a leg waits for its partner."""
