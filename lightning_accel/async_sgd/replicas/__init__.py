"""Model-parallel replicas: several processes that make up one worker, each with a part of every parameter."""
