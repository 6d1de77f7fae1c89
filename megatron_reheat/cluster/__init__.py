"""Starting runs: the ranks of one machine, one node's share of a larger run, and batch jobs."""
