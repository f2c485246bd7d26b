//! `hutch image import`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use hutch_contract::image::ImportFormat;
use hutch_contract::name::Name;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::App;
use crate::error::Error;
use crate::{transfer, waiting};

/// Where the ext4 superblock has its magic number, and that number (Linux, `Documentation/filesystems/ext4`).
const EXT4_MAGIC_AT: u64 = 1024 + 0x38;
const EXT4_MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();

/// Make an image from a root filesystem: a tar, plain or compressed, or a raw ext4 disk
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image import rootfs.tar.xz --name mine
  hutch image import disk.ext4 --name mine
  docker export c1 | hutch image import - --name mine")]
pub struct Args {
    /// The file, or - for standard input
    file: PathBuf,
    /// Name of the image
    #[arg(long)]
    name: Name,
    /// What the file is [default: what it looks like; a tar from standard input]
    #[arg(long)]
    format: Option<Format>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// A root filesystem tar, plain or compressed by gzip, xz or zstd
    Tar,
    /// A raw ext4 disk without a partition table
    Ext4,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let source = transfer::open(&args.file, app.ui).await?;
    let format = match args.format {
        Some(Format::Tar) => ImportFormat::Tar,
        Some(Format::Ext4) => ImportFormat::Ext4,
        None if source.size_bytes.is_some() && looks_like_ext4(&args.file).await => {
            ImportFormat::Ext4
        }
        None => ImportFormat::Tar,
    };
    let accepted = client
        .import_image(&args.name, format, source.size_bytes, source.body)
        .await;
    source.bar.finish_and_clear();
    let made = waiting::operation(&client, &accepted?.operation, app.ui).await?;
    if app.ui.json {
        app.ui.object(&client.image(&made).await?)?;
    } else {
        app.ui.name(args.name.as_str())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn looks_like_ext4(path: &Path) -> bool {
    let magic = async {
        let mut file = File::open(path).await?;
        file.seek(std::io::SeekFrom::Start(EXT4_MAGIC_AT)).await?;
        let mut magic = [0; 2];
        file.read_exact(&mut magic).await?;
        std::io::Result::Ok(magic)
    };
    magic.await.is_ok_and(|magic| magic == EXT4_MAGIC)
}
