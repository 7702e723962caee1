"""Token ids on disk: shards in Megatron's .bin/.idx format, their manifests, datasets of many."""
