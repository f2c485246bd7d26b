//! From the kernel's answers to gRPC statuses, in one place.

use std::io;

use rustix::io::Errno;
use tonic::{Code, Status};

/// `what: text`, with the code that fits.
pub fn of_io(what: &str, error: &io::Error) -> Status {
    Status::new(code(error), format!("{what}: {}", text(error)))
}

/// The kernel's words without "(os error N)".
pub fn text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

fn code(error: &io::Error) -> Code {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => Code::NotFound,
        Some(Errno::EXIST) => Code::AlreadyExists,
        Some(Errno::ACCESS | Errno::PERM) => Code::PermissionDenied,
        Some(Errno::ISDIR | Errno::NOTDIR | Errno::NOTEMPTY | Errno::BUSY | Errno::ROFS) => {
            Code::FailedPrecondition
        }
        Some(Errno::NOEXEC | Errno::TXTBSY | Errno::XDEV | Errno::OPNOTSUPP) => {
            Code::FailedPrecondition
        }
        Some(Errno::INVAL | Errno::NAMETOOLONG | Errno::LOOP | Errno::TOOBIG) => {
            Code::InvalidArgument
        }
        Some(
            Errno::NOSPC
            | Errno::DQUOT
            | Errno::FBIG
            | Errno::MFILE
            | Errno::NFILE
            | Errno::NOMEM
            | Errno::AGAIN,
        ) => Code::ResourceExhausted,
        Some(_) => Code::Internal,
        None => match error.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::InvalidInput => Code::InvalidArgument,
            io::ErrorKind::TimedOut => Code::DeadlineExceeded,
            io::ErrorKind::Unsupported => Code::FailedPrecondition,
            _ => Code::Internal,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_without_its_numbers() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(
            of_io("open /x", &error).message(),
            "open /x: no such file or directory"
        );
        assert_eq!(of_io("x", &error).code(), Code::NotFound);
        let full = io::Error::from_raw_os_error(28);
        assert_eq!(of_io("x", &full).code(), Code::ResourceExhausted);
    }
}
