"""One model over several processes: a log of steps from a leader, a front that outlives them."""
