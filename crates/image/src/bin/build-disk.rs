//! The child that writes disks, as a program of its own for the tests of this crate.

fn main() -> std::process::ExitCode {
    if std::env::args().nth(1).as_deref() != Some(hutch_image::SUBCOMMAND) {
        eprintln!("this program is a part of hutch and is started by it");
        return std::process::ExitCode::FAILURE;
    }
    hutch_image::child_main()
}
