//! The operator's tool. All of it is in the library, where tests reach it.

fn main() -> std::process::ExitCode {
    kv_daemon::kvctl::main()
}
