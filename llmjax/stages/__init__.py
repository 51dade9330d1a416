"""The stages that read a trained model: each is a command that brings a loaded model and other rooms together."""
