"""`lrc-edge inspect`: what model files hold."""
