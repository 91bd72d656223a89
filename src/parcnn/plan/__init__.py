"""From a model to a static program: trace, fuse, differentiate, place in memory, schedule. Pure Python, no device."""
