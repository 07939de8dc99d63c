"""The `pocketmoe` command."""
