"""`cumulant bench approximation`: the distance of Taylor attention from softmax attention."""
