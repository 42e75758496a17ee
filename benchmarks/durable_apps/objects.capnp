using Workerd = import "/workerd/workerd.capnp";

const config :Workerd.Config = (
  services = [
    (name = "main", worker = .worker),
    (name = "storage", disk = (writable = true)),
  ],
  sockets = [(name = "http", http = (), service = "main")],
);

const worker :Workerd.Worker = (
  modules = [(name = "objects.js", esModule = embed "objects.js")],
  compatibilityDate = "2026-11-01",
  durableObjectNamespaces = [(className = "Account", uniqueKey = "accounts", enableSql = true)],
  durableObjectStorage = (localDisk = "storage"),
  bindings = [(name = "ACCOUNTS", durableObjectNamespace = "Account")],
);
