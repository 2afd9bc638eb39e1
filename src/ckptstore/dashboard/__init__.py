"""The dashboard: is my training safe, how does it go, what is stored where. A reader of tiers and agent, nothing more.

Owns: pages, their data, who may look at them.
Must not know: torch, SDKs, how to change anything in a store.
Needs the extra ``ckptstore[dashboard]``; only :mod:`ckptstore.dashboard.app` imports it.
"""
