"""`manta bench serve`: an open-loop load generator for any OpenAI-compatible endpoint.

`workloads` fixes prompts and arrival times in advance, `client` sends them, `report` summarises what clients saw.
"""
