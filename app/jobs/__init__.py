"""Jobs: drafted, given a model, started, paused, resumed, cancelled; and all that is told of them."""
