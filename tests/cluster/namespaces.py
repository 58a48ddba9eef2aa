"""A cluster whose daemons and clients live in network namespaces of their own, for the scenarios that cut networks.

    switch (a bridge in a namespace of its own) ── m1 m2 …   masters
                                                ├─ c1 c2 …   chunk daemons
                                                └─ k …       clients: mounts and commands
"""

import json
import os
import subprocess
import time

PORT = 7100
# What a cut drops: what comes in, what goes out.
IN, OUT = ("input", 'iifname "eth"'), ("output", 'oifname "eth"')


def run(*command, check=True, timeout=60, **more):
    return subprocess.run(command, check=check, timeout=timeout, capture_output=True, text=True, **more)


def wait_for(seconds, what, condition):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def mounted(place):
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split()[4] == place for line in mounts)


class Cluster:
    def __init__(self, work, masters, chunkds, clients, master_settings="", chunkd_settings=""):
        self.work, self.bin, self.tag = work, os.environ["DFS_BIN_DIR"], f"dfs{os.getpid()}"
        self.masters, self.chunkds, self.clients = masters, chunkds, clients
        self.master_settings, self.chunkd_settings = master_settings, chunkd_settings
        self.address = {name: f"10.99.0.{number}" for number, name in enumerate([*masters, *chunkds, *clients], 11)}
        self.key = f"{work}/cluster.key"
        for directory in ("data", "log"):
            os.makedirs(f"{work}/{directory}")
        with open(self.key, "wb") as file:
            file.write(os.urandom(32).hex().encode())
        os.chmod(self.key, 0o600)

    # ---- the network ----

    def inside(self, name, *command):
        """A command in a node's network namespace; everything else is this process's."""
        return ["nsenter", f"--net=/run/netns/{self.tag}{name}", "--", *command]

    def make_network(self):
        inside = self.inside
        run("ip", "netns", "add", f"{self.tag}sw")
        run(*inside("sw", "ip", "link", "add", "name", "switch", "type", "bridge"))
        run(*inside("sw", "ip", "link", "set", "switch", "up"))
        for name, address in self.address.items():
            run("ip", "netns", "add", f"{self.tag}{name}")
            run(*inside("sw", "ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth", "netns", f"{self.tag}{name}"))
            run(*inside("sw", "ip", "link", "set", "dev", name, "master", "switch", "up"))
            run(*inside(name, "ip", "addr", "add", f"{address}/24", "dev", "eth"))
            run(*inside(name, "ip", "link", "set", "eth", "up"))
            run(*inside(name, "ip", "link", "set", "lo", "up"))

    def remove_network(self):
        for name in [*self.address, "sw"]:
            run("ip", "netns", "del", f"{self.tag}{name}", check=False)

    def cut(self, name, rules):
        """Drops what the rules say in a node's namespace; the counter tells whether anything was."""
        text = "table inet cut {\n" + "".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {match} counter drop; }}\n" for hook, match in rules
        ) + "}\n"
        run(*self.inside(name, "nft", "-f", "-"), input=text)

    def dropped(self, name):
        listed = json.loads(run(*self.inside(name, "nft", "-j", "list", "table", "inet", "cut")).stdout)
        counters = [
            expression["counter"]["packets"]
            for item in listed["nftables"]
            if "rule" in item
            for expression in item["rule"]["expr"]
            if "counter" in expression
        ]
        return min(counters)

    def mend(self, name):
        run(*self.inside(name, "nft", "delete", "table", "inet", "cut"))

    # ---- commands and mounts ----

    def addresses(self):
        return ",".join(f"{self.address[name]}:{PORT}" for name in self.masters)

    def dfs(self, *arguments, check=True, timeout=60):
        command = [f"{self.bin}/dfs", "--masters", self.addresses(), *arguments]
        return run(*self.inside(self.clients[-1], *command), check=check, timeout=timeout)

    def status(self):
        return json.loads(self.dfs("--timeout", "5", "status", "--json").stdout)

    def ready(self):
        count = str(len(self.chunkds))
        return self.dfs("--timeout", "2", "status", "--ready", count, check=False).returncode == 0

    def leader(self):
        try:
            leaders = [master["id"] for master in self.status()["masters"] if master["leader"]]
        except (subprocess.SubprocessError, ValueError):
            return None
        return self.masters[leaders[0] - 1] if leaders else None

    def mount(self, client, place, options, log):
        os.makedirs(place, exist_ok=True)
        command = [f"{self.bin}/dfs-mount", "-o", options, "--foreground", "--masters", self.addresses(), place]
        with open(f"{self.work}/log/{log}.log", "ab") as file:
            return subprocess.Popen(
                self.inside(client, *command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=dict(os.environ, NO_COLOR="1", RUST_LOG=os.environ.get("DFS_LOG", "info")),
            )


    # ---- the end ----

    def clean_up(self, places, processes):
        """Unmounts, kills what still runs, and removes the network. No program is left behind, whatever happened before."""
        for place in places:
            if mounted(place):
                run("umount", "-l", place, check=False)
        for process in processes:
            if process and process.poll() is None:
                process.kill()
                process.wait(20)
        self.remove_network()


class Daemon:
    def __init__(self, cluster, name):
        self.cluster, self.name, self.process = cluster, name, None
        self.data, self.config = f"{cluster.work}/data/{name}", f"{cluster.work}/{name}.toml"
        self.log = f"{cluster.work}/log/{name}.log"
        program, text = self.settings()
        with open(self.config, "w") as file:
            file.write(text)
        os.makedirs(self.data)
        self.command = cluster.inside(name, f"{cluster.bin}/{program}", "--config", self.config)

    def settings(self):
        cluster = self.cluster
        common = f'listen = "{cluster.address[self.name]}:{PORT}"\ncluster_key_file = "{cluster.key}"\n'
        if self.name in cluster.chunkds:
            masters = ", ".join(f'"{cluster.address[name]}:{PORT}"' for name in cluster.masters)
            more = f'masters = [{masters}]\ndata = ["{self.data}"]\nhost = "{self.name}"\n{cluster.chunkd_settings}'
            return "dfs-chunkd", common + more
        peers = "".join(
            f'[[peers]]\nid = {number}\naddress = "{cluster.address[name]}:{PORT}"\n'
            for number, name in enumerate(cluster.masters, 1)
        )
        number = cluster.masters.index(self.name) + 1
        more = f'id = {number}\ndata = "{self.data}"\nreplicas = 3\nchunk_size = "4MiB"\n{cluster.master_settings}{peers}'
        return "dfs-master", common + more

    def start(self):
        with open(self.log, "ab") as log:
            environment = dict(os.environ, NO_COLOR="1", RUST_LOG=os.environ.get("DFS_LOG", "info"))
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def lives(self):
        return self.process is not None and self.process.poll() is None

    def state(self):
        with open(f"/proc/{self.process.pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]

    def kill(self):
        self.process.kill()
        self.process.wait(20)
