"""kvtier: a tier manager for KV caches. `kvtier.lmcache` is its LMCache adapter."""
