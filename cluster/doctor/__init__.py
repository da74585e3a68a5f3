"""What is looked at before a model is loaded: facts of every rank's process, findings made of them, links measured."""
