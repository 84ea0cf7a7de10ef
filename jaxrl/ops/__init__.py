"""Mathematics as functions of arrays: no network, no configuration, no agent."""
