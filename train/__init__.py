"""Training: recipe, loop, loss, optimizer, metrics, checkpoints and the engines that run the steps."""
