"""What one worker process of an asynchronous run does in a `fit`: its session, its data, its checkpoints."""
