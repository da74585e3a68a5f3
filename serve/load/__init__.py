"""`manta bench serve`: load for any OpenAI endpoint at fixed arrival times, and what its clients would have seen.

`workloads` decides what is asked and when, before anything is sent; `client` sends it; `report` counts.
"""
