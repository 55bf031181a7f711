"""Online work: the gateway, the replica and the engine behind them."""
