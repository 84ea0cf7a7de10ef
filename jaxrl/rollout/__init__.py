"""Rollouts of agents in environments, on the device (`device`) or with CPU simulators (`host`, `workers`)."""
